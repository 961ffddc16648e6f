"""What each server needs to serve an image, written from its record: one target a file."""
