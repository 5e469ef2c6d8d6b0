"""`dali-views`, or `python -m dali_views`."""

import sys


def main() -> int:
    """Run one command; the doctor also where the packages that the others import are broken."""
    if sys.argv[1:2] == ["doctor"]:
        from .tools.doctor import examine as doctor

        return doctor.main(sys.argv[2:])
    from .tools import cli

    return cli.main()


if __name__ == "__main__":  # worker processes import this file too
    raise SystemExit(main())
