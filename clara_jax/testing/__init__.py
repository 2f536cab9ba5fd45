"""For tests, of one's own estimators and stages too: tiny models, published models made small, and
the comparison with the released code's numbers."""
