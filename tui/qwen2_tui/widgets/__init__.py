"""What screens are made of. A widget tells what was done to it in messages, and is told what to show by method calls."""
