"""One module for each method that chooses layers."""
