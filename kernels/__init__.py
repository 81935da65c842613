"""Triton kernels, one file per operator; installed as `bigmodel_fast.kernels`."""
