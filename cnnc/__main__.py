"""`python -m cnnc`: the command line, where the script is not on the path."""

from cnnc.cli.main import main

main()
