"""Fused optimizers and schedules."""
