"""`python -m thinkserve.train`: see family.py."""

from thinkserve.train.family import main

if __name__ == "__main__":
    main()
