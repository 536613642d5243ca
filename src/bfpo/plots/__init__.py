"""Drawing: the style of every figure, and the plane of helpfulness and harmlessness."""
