"""Closed forms in plain torch, Triton launchers, dispatcher ops and autograd Functions: one file an op."""
