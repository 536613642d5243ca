"""What every room needs: errors, the shapes of the data, files, run folders, the console."""
