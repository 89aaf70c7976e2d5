"""What a repair writes, to the byte, before anything is written."""
