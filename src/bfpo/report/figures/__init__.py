"""Figures of a report; never touches the state of pyplot."""
