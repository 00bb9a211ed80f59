"""What `launch.demo` is made of."""
