"""The page of evidence: gather run folders, lay out, write."""
