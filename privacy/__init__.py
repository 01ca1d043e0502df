"""Differential privacy for visitors: accounting, calibration, mechanisms, training."""
