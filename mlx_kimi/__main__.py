"""The program: `mlx_kimi`, or `python -m mlx_kimi`."""

from mlx_kimi.cli.interrupts import end_quietly


def main() -> None:
    """Run the command line, and end with its exit code."""
    end_quietly()
    from mlx_kimi.cli.main import cli  # here: it takes long enough to be interrupted

    try:
        cli(prog_name="mlx_kimi")
    finally:
        end_quietly()


if __name__ == "__main__":
    main()
