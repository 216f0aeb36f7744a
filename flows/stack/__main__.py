from flows.stack.services import main

main()
