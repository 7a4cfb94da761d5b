"""What a run needs from outside, checked in seconds before any of it takes a GPU."""
