"""From the rows of a data set to the samples that layers are scored on."""
