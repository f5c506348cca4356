"""What tests share: models, settings, runs on engines, and what damages files."""
