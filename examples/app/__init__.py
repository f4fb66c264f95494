"""The parts of the programs: what they alone need. What any trainer needs is in `longlora_ext`."""
