"""The web page of demo.py: what it does, and its looks."""
