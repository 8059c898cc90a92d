"""The console's pages, one file for each thing that an operator looks after."""
