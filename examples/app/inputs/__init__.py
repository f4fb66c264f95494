"""From files of text or conversations to rows of token ids: what a model is trained and measured on."""
