from flows.dispatcher.dispatcher import main

main()
