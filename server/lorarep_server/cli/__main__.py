"""`python -m lorarep_server.cli` runs the command line `lorarep`."""

from lorarep_server.cli.commands import main

main()
