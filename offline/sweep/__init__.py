"""Many sizes and methods from one calibration."""
