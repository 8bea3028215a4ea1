"""``python -m mmema COMMAND`` is the console script ``mmema COMMAND``."""

from .cli.main import main

if __name__ == '__main__':
    main()
