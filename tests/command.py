"""``mmema COMMAND`` as a script, for a fork."""

from mmema.cli.main import main

main()
