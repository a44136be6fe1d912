"""Strategies that take A and B of a LoRA layer together, as the mean of the products is not that of the factors.

    M = sum p_i B_i A_i,    M - Bbar Abar = sum p_i (B_i - Bbar)(A_i - Abar)

All work on stacks of factors (`stacked_factors`), whose sizes grow with out + in of a layer; none forms M itself.
"""
