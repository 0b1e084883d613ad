// Command calls makes single calls: a write that is repeated, an error, an update, and a list page by page.
//
//	calls ADDRESS
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	roster "example.com/roster/clients/go"
	rosterv1 "example.com/roster/clients/go/roster/v1"
)

func main() {
	client, err := roster.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if err := run(context.Background(), client); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, client *roster.Client) error {
	request := &rosterv1.CreateUserRequest{User: &rosterv1.User{Email: "ada@example.org"}}
	ada, err := client.Users.CreateUser(ctx, request)
	if err != nil {
		return err
	}
	fmt.Printf("created user %d, version %d\n", ada.Id, ada.Version)

	// The same request again is another write, because each call gets a request_id of its own.
	_, err = client.Users.CreateUser(ctx, request)
	switch roster.Reason(err) {
	case "EMAIL_TAKEN":
		fmt.Printf("user %s has this e-mail\n", roster.ErrorFrom(err).Facts["existing_id"])
	default:
		return fmt.Errorf("expected that the e-mail is taken: %w", err)
	}

	name := "Ada King"
	change := &rosterv1.User{Id: ada.Id, FullName: &name, Version: ada.Version}
	if ada, err = client.Users.UpdateUser(ctx, &rosterv1.UpdateUserRequest{User: change}); err != nil {
		return err
	}
	fmt.Printf("%s, version %d\n", ada.GetFullName(), ada.Version)

	list := &rosterv1.ListUsersRequest{Filter: `email = "ada@example.org"`, PageSize: 100}
	for user, err := range roster.Pages(ctx, client.Users.ListUsers, list, (*rosterv1.ListUsersResponse).GetUsers) {
		if err != nil {
			return err
		}
		fmt.Println(user.Email)
	}
	return nil
}
