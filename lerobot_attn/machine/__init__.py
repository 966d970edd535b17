"""What the machine needs: LIBERO's files, a GL backend, versions that fit."""
