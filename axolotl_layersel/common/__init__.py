"""What every other folder builds on: errors, files and their places, tables, and random streams."""
