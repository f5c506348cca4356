"""The parts that all other folders use: errors, files and their paths, digests, tables, and random streams."""
