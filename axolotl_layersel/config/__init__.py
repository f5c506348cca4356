"""The keys of the YAML file, and the checks of the rest of the file against them. Nothing here imports torch."""
