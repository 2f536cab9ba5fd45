"""A laboratory for gradient estimators: exact gradients for few documents, audits against them,
trainings side by side."""
