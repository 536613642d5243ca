"""The report page: read run folders, lay out, write."""
