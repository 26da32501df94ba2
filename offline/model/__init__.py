"""Reading the dense model: its skeleton, its weights one layer at a time, its towers."""
