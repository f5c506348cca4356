"""The keys of the YAML file, and what contradicts them. Nothing here imports torch."""
