"""What is optimised: one method, one page; pure functions that know no trainer."""
