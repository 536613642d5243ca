"""The paper's objective: pure functions of tensors."""
