"""`python -m trackrec`."""

from trackrec.cli import app

app()
