"""Running the samples and independent computations, in this process or in several."""
