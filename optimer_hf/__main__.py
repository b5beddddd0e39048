"""`python -m optimer_hf`, which `accelerate launch -m optimer_hf train ...` needs."""

from optimer_hf.cli import main

if __name__ == "__main__":
    main()
