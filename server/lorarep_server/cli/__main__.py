"""`python -m lorarep_server.cli.commands` is `lorarep`."""

from lorarep_server.cli.commands import main

main()
