"""`python -m skyrl_mega` is the command line."""

from skyrl_mega.launch.cli import exit_with_main

if __name__ == "__main__":
    exit_with_main()
