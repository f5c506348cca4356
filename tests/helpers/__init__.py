"""Models, settings, runs on engines and damage to files that tests share."""
