"""The report page: read run folders, arrange the results, write HTML, Markdown, JSON and CSV."""
