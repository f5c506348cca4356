"""L1RA (arXiv 2509.04884): rank that moves between LoRA modules while the model trains."""
