"""The style of every figure, and the plot of helpfulness against harmlessness."""
