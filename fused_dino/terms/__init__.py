"""The wing of the terms: a student's tensors and the teacher's features become a loss and its logs."""
