"""Entry point of `python -m effnet_fast VERB` and `torchrun -m effnet_fast VERB`."""

from effnet_fast.cli import main

if __name__ == "__main__":
    main()
