"""Torch and the device are there in every test."""

import torch  # noqa: F401

import torch_trn  # noqa: F401
